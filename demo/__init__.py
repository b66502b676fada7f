"""Real vLLM engines on a CPU: the demo, and the launcher that tests and benchmarks use."""
