"""Keys, certificates, signatures and who may say what."""
