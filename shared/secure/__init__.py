"""Split-trust secure aggregation: masks, seals and buckets. Pure; docs/privacy.md explains the protocol."""
