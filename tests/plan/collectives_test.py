import numpy as np
import pytest

from moe_jax.plan import collectives, hlo, topology
from moe_jax.plan.collectives import Devices

AXES = {"data": 2, "fsdp": 4, "expert": 4}


@pytest.mark.parametrize("text, expected", [
    ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x=1", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_2'}",
     [[0, 2], [1, 3]]),
    ("replica_groups=mesh['axis_0'=2,'axis_2'=2], device_ids=([4]) {'axis_2'}", [[0, 1], [2, 3]]),
    ("source_target_pairs={{0,1},{1,2}}", [[0, 1], [1, 2]]),
    ("channel_id=1", [[0, 1, 2, 3]]),
    ("replica_groups={}, channel_id=1", [[0, 1, 2, 3]]),
])
def test_groups_in_every_notation(text, expected):
  assert collectives.groups_of(text, 4).tolist() == expected


def test_groups_in_an_unknown_notation_are_not_priced_as_all_devices():
  with pytest.raises(ValueError, match=r"unknown notation: replica_groups=\(\[4\]\)"):
    collectives.groups_of("channel_id=1, replica_groups=([4])", 4)


@pytest.mark.parametrize("chosen", [("data",), ("fsdp",), ("expert",), ("fsdp", "expert"),
                                    ("data", "expert"), ("data", "fsdp", "expert")])
def test_groups_are_named_by_their_mesh_axes(chosen):
  ids = np.arange(32).reshape(2, 4, 4)
  names = list(AXES)
  order = [i for i, n in enumerate(names) if n not in chosen] + [names.index(n) for n in chosen]
  size = int(np.prod([AXES[name] for name in chosen]))
  groups = ids.transpose(order).reshape(-1, size)
  assert collectives.axes_of(groups, AXES) == "+".join(chosen)


def on(name: str, shape: tuple[int, ...], n_slices: int = 1) -> tuple[Devices, topology.Topology]:
  grid = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)
  n = len(grid)
  return (Devices({"data": n_slices, "expert": n}, np.tile(grid, (n_slices, 1)),
                  np.repeat(np.arange(n_slices), n)), topology.parse(name, n_slices))


def test_a_ring_beats_a_line_and_two_dimensions_beat_one():
  ring = on("v6e-256", (16, 16))
  line = on("v6e-64", (8, 8))
  column = np.arange(16)[None] * 16
  closed = collectives.seconds("all-gather", 10**9, column, *ring)
  link = 400e9 / 4
  assert closed == pytest.approx(1e9 * 15 / 16 / (2 * link))
  opened = collectives.seconds("all-gather", 10**9, np.arange(8)[None] * 8, *line)
  assert opened == pytest.approx(1e9 * 7 / 8 / link)
  whole = collectives.seconds("all-gather", 10**9, np.arange(64)[None], *line)
  assert whole == pytest.approx(1e9 * 63 / 64 / (2 * link))
  assert collectives.seconds("all-reduce", 10**9, np.arange(64)[None], *line) == 2 * whole
  assert collectives.seconds("reduce-scatter", 10**9, np.arange(64)[None], *line) == whole


def test_all_to_all_is_bound_by_the_middle():
  """Counted the slow way: bytes over each link of a line, every pair by its only path."""
  n, n_bytes = 8, 8e8
  devices, where = on("v6e-64", (8, 8))
  over = np.zeros(n - 1)
  for source in range(n):
    for target in range(source + 1, n):
      over[source:target] += n_bytes / n
  link = 400e9 / 4
  assert collectives.seconds("all-to-all", n_bytes, np.arange(8)[None] * 8, devices,
                             where) == pytest.approx(over.max() / link)


def test_alone_or_on_one_chip_is_free():
  devices, where = on("v5p-8", (2, 2, 1))
  assert collectives.seconds("all-gather", 10**9, np.array([[0]]), devices, where) == 0
  cores = Devices({"expert": 2}, np.zeros((2, 3), int), np.zeros(2, int))
  assert collectives.seconds("all-reduce", 10**9, np.array([[0, 1]]), cores, where) == 0


def test_the_devices_of_a_chip_share_its_links():
  """By counting what every chip of a ring of four, with two devices each, has to receive."""
  where = topology.parse("tpu7x-128")
  chips = np.stack([np.arange(4), np.zeros(4, int), np.zeros(4, int)], axis=1)
  devices = Devices({"a": 4, "core": 2}, np.repeat(chips, 2, axis=0), np.zeros(8, int))
  both, apart = np.arange(8)[None], np.array([[0, 2, 4, 6], [1, 3, 5, 7]])
  n_bytes, link = 8e9, 600e9 / 6

  def gather(groups):
    return collectives.seconds("all-gather", n_bytes, groups, devices, where)

  # Both devices of a chip want the same array, so it arrives once; two groups want an array each.
  assert gather(both) == pytest.approx(n_bytes * 3 / 4 / (2 * link))
  assert gather(apart) == pytest.approx(2 * gather(both))
  # Half of the bytes of the four devices on one side cross the middle, over two links.
  for groups in (both, apart):
    assert collectives.seconds("all-to-all", n_bytes, groups, devices, where) == pytest.approx(
        4 * n_bytes / 2 / (2 * link))
  for pairs, sending in (([[0, 2], [1, 3]], 2),  # both devices of chip 0 send to chip 1
                         ([[0, 1], [1, 2], [2, 3], [3, 4]], 1),  # one of each chip leaves it
                         ([[0, 1], [2, 3]], 0)):
    assert collectives.seconds("collective-permute", n_bytes, np.array(pairs), devices,
                               where) == pytest.approx(sending * n_bytes / link)


def test_between_slices_the_network_counts():
  devices, where = on("v6e-4", (2, 2), n_slices=2)
  group = np.array([[0, 4], [1, 5], [2, 6], [3, 7]])
  assert collectives.seconds("all-reduce", 10**9, group, devices, where) == pytest.approx(
      2 * 1e9 / 2 / 12.5e9)


def test_the_slowest_group_counts_wherever_it_stands():
  where = on("v6e-64", (8, 8))
  groups = np.array([[0, 8, 16, 24], [1, 9, 2, 10]])  # a line of four, and a square
  line, square = (collectives.seconds("all-gather", 10**9, groups[i:i + 1], *where)
                  for i in (0, 1))
  assert line == 2 * square
  for order in (groups, groups[::-1]):
    assert collectives.seconds("all-gather", 10**9, order, *where) == line


def test_a_permute_across_slices_takes_the_network():
  where = on("v6e-4", (2, 2), n_slices=2)
  inside, across = np.array([[0, 1], [4, 5]]), np.array([[0, 1], [1, 5]])
  assert collectives.seconds("collective-permute", 10**9, inside, *where) == 1e9 / (400e9 / 4)
  assert collectives.seconds("collective-permute", 10**9, across, *where) == 1e9 / 12.5e9


def test_a_ragged_exchange_moves_rows_and_not_the_room_for_them():
  module = hlo.parse("""HloModule m

ENTRY %main (a: bf16[100,8], b: bf16[800,8], n: s32[4]) -> bf16[800,8] {
  %a = bf16[100,8]{1,0} parameter(0)
  %b = bf16[800,8]{1,0} parameter(1)
  %n = s32[4]{0} parameter(2)
  ROOT %x = bf16[800,8]{1,0} ragged-all-to-all(%a, %b, %n, %n, %n, %n), replica_groups={{0,1}}
}
""")
  entry = module.computations[module.entry]
  assert collectives.moved_bytes("ragged-all-to-all", entry, entry.root) == 100 * 8 * 2
