"""The fleet's keys: authority, identities, TLS certificates, the inventory that the access list is made of."""
