"""The algorithm. It imports torch and names neither vLLM nor vllm-ascend."""
