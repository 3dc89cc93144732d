"""Routing, dispatch and expert parallelism: pure functions, the heart of the project.

Shape suffixes: T tokens on this device, D d_model, E experts, e experts on this device,
K n_topk, F d_expert, H = 2 F gate and up side by side, G routing groups, N tokens in a group,
C capacity, R rows given to an expert, S rows of all experts one after another (E*G*C slots; in
x_BSD, outside of dispatch, S is the sequence, as everywhere else).
"""
