"""What a model is and costs: zeros, sizes, latency, memory; as tables and pictures. Knows no pruner."""
