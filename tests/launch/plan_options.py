"""Any options that a backend accepts, as Hypothesis strategies."""

from hypothesis import strategies as st

from launch.backends import gcloud, gke, slurm

WORDS = st.from_regex(r"[a-z][a-z0-9-]{0,20}[a-z0-9]", fullmatch=True)
ZONES = st.sampled_from(["us-east5-b", "europe-west4-a", "asia-northeast1-b"])
SLICES = st.sampled_from(["v4-8", "v5litepod-16", "v5p-64", "v6e-1", "v6e-8", "v6e-256"])


def _maybe(strategy):
  return st.none() | strategy


GCLOUD = st.builds(
    lambda money, **rest: gcloud.Options(max_cost_usd=money[0], delete_when_done=money[1], **rest),
    money=st.sampled_from([(None, True), (None, False), (5.0, True)]), project=WORDS,
    zones=st.lists(ZONES, min_size=1, max_size=3).map(tuple),
    topology=SLICES, slices=st.integers(1, 4), slices_per_run=st.integers(1, 3),
    capacity=st.sampled_from(["spot", "on-demand", "reserved"]), runtime_version=_maybe(WORDS),
    network=_maybe(WORDS), subnetwork=_maybe(WORDS),
    service_account=_maybe(WORDS.map(lambda word: f"{word}@p.iam.gserviceaccount.com")),
    internal_ips=st.booleans(),
    valid_until=_maybe(st.sampled_from(["6h", "90m", "1h30m", "2d", "30s"])),
    python=_maybe(st.just("/opt/venv/bin/python")),
    secrets=st.sampled_from([(), ("WANDB_API_KEY=projects/p/secrets/s/versions/latest",),
                             ("A=/etc/a", "B=/etc/b")]))
GKE = st.builds(
    lambda capacity, **rest: gke.Options(
        capacity=capacity, reservation="r1" if capacity == "reserved" else None, **rest),
    capacity=st.sampled_from(["spot", "on-demand", "reserved"]),
    topology=SLICES | st.just("tpu7x-64"), image=st.just("r.pkg.dev/p/r/moe-jax:1"),
    slices=st.integers(1, 4), slices_per_run=st.integers(1, 3), queue=_maybe(WORDS),
    namespace=WORDS, kube_context=_maybe(WORDS), max_restarts=st.integers(0, 9),
    secrets=st.sampled_from([(), ("WANDB_API_KEY=kubernetes/wandb/key",)]))
SLURM = st.builds(
    lambda gpus, tasks, **rest: slurm.Options(
        gpus_per_node=gpus, tasks_per_node=None if gpus else tasks, **rest),
    gpus=st.integers(0, 8), tasks=_maybe(st.integers(1, 4)), slices=_maybe(st.integers(1, 4)),
    max_running=_maybe(st.integers(1, 4)), nodes=st.integers(1, 3), partition=_maybe(WORDS),
    account=_maybe(WORDS), time=_maybe(st.sampled_from(["60", "24:00:00", "2-12:00:00"])),
    python=_maybe(st.just("/opt/venv/bin/python")),
    secrets=st.sampled_from([(), ("TOKEN=/etc/token",)]))
