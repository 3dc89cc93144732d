"""Routing, dispatch and expert parallelism: pure functions, the heart of the project.

Shape suffixes: T tokens on this device, D d_model, E experts, e experts on this device,
K n_topk, F d_expert, G routing groups, N tokens in a group, C capacity, S = E*G*C slots,
R rows given to an expert.
"""
