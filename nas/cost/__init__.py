"""What subnets cost: counts, lookup tables, fitted and measured latencies, devices."""
