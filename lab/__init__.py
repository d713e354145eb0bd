"""Workloads, clients and measurements that the demo, the tests and the benchmark share."""
