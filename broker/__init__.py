"""The embedded MQTT broker, and what configures Mosquitto in its place."""
