"""Search with value models: best-of-N, and beams ranked by log-probability plus value.

Token-level guidance tilts every step of one response; search compares whole responses, or prefixes
of several. Both functions take a batch of prompts and a transformers model or a `vllm.LLM`: what
they are given and return is in `interface`. `best_of_n` ranks responses, which `sampling` draws and
drops early in either host; `beam` follows prefixes.
"""
