"""What tests share: certificates, real brokers, and proxies that count, cut and refuse."""
