"""Packaging of compofa: files, dependencies and commands."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DOCS = ["pdoc>=15"]
EXPORT = ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2", "safetensors>=0.4"]


def read_version() -> str:
    """Return ``__version__`` of the package without importing it (dependencies may be missing)."""
    source = (ROOT / "compofa" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise SystemExit('compofa/__init__.py: expected a line of the form __version__ = "1.2.3"')
    return found[1]


def read_description() -> str:
    """Return the README, the page that a package index shows."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="compofa",
    version=read_version(),
    description="Once-for-all networks with compound search spaces: train once, search in seconds",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    # As torch 2.13, the newest tested release.
    python_requires=">=3.10",
    # checkpoints/ is at the top of the repository, where people look for it, and is installed as
    # compofa/checkpoints. Its files are therefore either in `checkpoints` next to the modules of
    # compofa (pip install .) or one level above them (a clone, pip install -e .).
    packages=[
        *find_packages(include=["compofa", "compofa.*", "nas", "nas.*"]),
        "compofa.checkpoints",
    ],
    package_dir={"compofa.checkpoints": "checkpoints"},
    package_data={
        "compofa": ["py.typed"],
        "compofa.checkpoints": ["**/*"],
        "nas": ["py.typed", "report/*.html", "models/**/*"],
    },
    include_package_data=False,
    zip_safe=False,
    # Lower bounds only; constraints.txt pins the versions that are tested together.
    install_requires=[
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.1",
        "pyyaml>=6",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tensorboard>=2.15",
        "torch>=2.4",
        "torchvision>=0.19",
        "tqdm>=4.65",
    ],
    extras_require={
        "test": [
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.9",
            *DOCS,
            *EXPORT,
        ],
        # A source distribution: building it needs g++ and cmake, and C++17 for a current PyTorch,
        # which tools/install_horovod (make horovod) sets.
        "horovod": ["horovod>=0.28.1"],
        "docs": DOCS,
        "timm": ["timm>=1.0"],
        "export": EXPORT,
        "mlflow": ["mlflow>=2.14"],
        "wandb": ["wandb>=0.17"],
    },
    entry_points={
        "console_scripts": [
            "compofa = compofa.cli.main:main",
            "compofa-train = compofa.cli.train:main",
            "compofa-eval = compofa.cli.evaluate:main",
            "compofa-search = nas.cli.search:main",
        ]
    },
)
