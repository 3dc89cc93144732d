"""Routing, dispatch and expert parallelism, as pure functions.

Shape suffixes: T tokens on this device, D d_model, E experts, e experts on this device,
K n_topk, F d_expert, H = 2 F (gate and up concatenated), G routing groups, N tokens per group,
C capacity, R rows per expert, S rows of all experts, concatenated (the E*G*C slots). Outside
dispatch, as in x_BSD, S is the sequence length, as everywhere else.
"""
