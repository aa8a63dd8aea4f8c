"""Fronts of several rewards: what answers prompts under weights, and what that gives and costs.

Any policy takes part, ours or another's: a callable from prompts, weights and a seed to responses.
Those callables sample, and nothing else here does but `command`, for `trimtab evaluate`. What is
compared is in `points`, how it is answered and rewarded in `sweep`, gains and hypervolumes are in
`fronts`, a language model as a judge is in `judge`, tables and pictures are in `report`.
"""
