"""The coordinator's durable state: database, blobs, and what a restart makes of them."""
