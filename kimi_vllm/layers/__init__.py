"""The layers of Kimi Linear on vLLM's parallel linears, norms and fused MoE."""
