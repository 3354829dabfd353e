"""The only modules that touch an MQTT client's internals."""
