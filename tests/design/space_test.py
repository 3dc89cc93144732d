import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.arch import Architecture, count
from moe_jax.design import inference
from moe_jax.design.space import DEFAULT_TEMPLATE, Space, lattice
from moe_jax.errors import FieldError

SMALL = Space(multiple=64, aspect=(16, 64), granularity=(1, 4), experts=(4, 16), topk=(1, 4))


@st.composite
def templates(draw):
  kv_heads = draw(st.sampled_from([None, 1, 2, 4]))
  n_heads = (kv_heads or 1) * draw(st.integers(1, 4))
  head_dim = draw(st.sampled_from([32, 64, 128]))
  return Architecture(
      n_layers=4, d_model=draw(st.sampled_from([1, 2])) * n_heads * head_dim // 2 or 64,
      d_expert=128, n_exp=8, n_topk=2, n_heads=n_heads, n_kv_heads=kv_heads,
      head_dim=head_dim, vocab_size=draw(st.integers(1, 200_000)),
      n_shared_experts=draw(st.integers(0, 2)), n_dense_layers=draw(st.integers(0, 3)),
      tie_embeddings=draw(st.booleans()))


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(templates(), st.sampled_from([8, 64, 128, 192]), st.integers(0, 2**32 - 1))
def test_counts_of_many_are_the_exact_ones_of_each(template, multiple, seed):
  space = Space(template=template, multiple=multiple, experts=(1, 1024), topk=(1, 64))
  rng = np.random.default_rng(seed)
  l_N, d_N, f_N = (x[rng.integers(0, len(space.shapes()[0]), 20)] for x in space.shapes())
  routings = [(e, k) for e, topks in space.routings().items() for k in topks]
  e_N, k_N = np.array(routings)[rng.integers(0, len(routings), 20)].T
  shape = space.shape(l_N, d_N, f_N, e_N, k_N)
  serving = inference.Serving(dtype="float8", batch=3, context=100)
  memory_N = inference.memory_gb(shape, serving)
  for i, five in enumerate(zip(l_N, d_N, f_N, e_N, k_N, strict=True)):
    arch = space.architecture(*map(int, five))  # Architecture checks what it is given
    assert shape.n_total[i] == count.n_total(arch)
    assert shape.n_active[i] == count.n_active(arch)
    assert count.n_total_with_embedding(shape)[i] == count.n_total_with_embedding(arch)
    assert shape.n_active_with_embedding[i] == count.n_active_with_embedding(arch)
    assert count.decode_flops_per_token(shape, 77)[i] == count.decode_flops_per_token(arch, 77)
    assert memory_N[i] == (count.weight_bytes(arch, "float8")
                           + count.kv_cache_bytes(arch, 3, 100, "bfloat16")) / 1e9
    assert (arch.n_shared_experts, arch.n_dense_layers, arch.tie_embeddings) == (
        template.n_shared_experts, template.n_dense_layers, template.tie_embeddings)


def test_every_shape_is_friendly_and_in_range():
  for space in (Space(), SMALL):
    l_N, d_N, f_N = space.shapes()
    assert len(l_N) == len(set(zip(l_N.tolist(), d_N.tolist(), f_N.tolist(), strict=True)))
    assert not np.any(d_N % space.multiple) and not np.any(f_N % space.multiple)
    for ratio, (low, high) in ((d_N / l_N, space.aspect), (d_N / f_N, space.granularity)):
      assert ratio.min() >= low and ratio.max() <= high


def test_routings():
  assert SMALL.routings() == {4: [1, 2], 6: [1, 2, 3], 8: [1, 2, 3, 4], 12: [1, 2, 3, 4],
                              16: [1, 2, 3, 4]}
  assert Space(experts=(1, 2)).routings() == {1: [1], 2: [1]}  # one expert is a dense model
  assert {64, 128, 256, 384} <= set(Space().expert_counts())


def test_dense_layers_leave_room_for_one_with_experts():
  template = Architecture(**{**vars(DEFAULT_TEMPLATE), "n_layers": 4, "n_dense_layers": 3})
  assert Space(template=template).shapes()[0].min() == 4


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.floats(0.5, 3000), st.floats(1, 30), st.sampled_from([1, 8, 128]),
                  st.sampled_from([1.03, 1.2]))
def test_a_lattice_holds_its_ends_and_leaves_no_wide_gap(low, ratio, multiple, step):
  found = lattice(low, low * ratio, multiple, step)
  tie = 1e-9 * multiple  # an end that a rounding error away is a multiple counts as one
  inside = [m for m in range(multiple, int(low * ratio + tie) + 1, multiple) if m >= low - tie]
  assert set(found) <= set(inside) and bool(len(found)) == bool(inside)
  if inside:
    assert found[0] == inside[0] and found[-1] == inside[-1]
    assert np.all(found[1:] <= found[:-1] * step + multiple * 1.01)


@pytest.mark.parametrize("given, line", [
    ({"experts": (9, 11)}, "experts='9:11': contains no power of two"),
    ({"experts": (8, 8), "topk": (5, 64)}, "topk='5:64': contains none"),
    ({"multiple": 4}, "multiple=4: must lie"),
    ({"aspect": (1e5, 2e5)}, "aspect='100000:200000': allows no shape with granularity 0.5:16"),
    ({"granularity": (1000, 2000)}, "aspect='32:128': allows no shape with granularity 1000:2000"),
])
def test_an_empty_space_is_refused(given, line):
  with pytest.raises(FieldError) as error:
    Space(**given)
  assert str(error.value).startswith(line) and "\n" not in str(error.value)
