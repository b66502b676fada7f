"""Packaging. The version is written in oproj_patch/_version.py, nowhere else."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
about: dict[str, str] = {}
exec((here / "oproj_patch" / "_version.py").read_text(encoding="utf-8"), about)

setup(
    name="oproj_patch",
    version=about["__version__"],
    description="Tensor parallelism for vLLM's attention output projection across "
    "data-parallel ranks",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["oproj_patch", "oproj_patch.*"]),
    package_data={"oproj_patch": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["wrapt>=1.16,<3"],
    entry_points={
        "console_scripts": ["oproj-patch = oproj_patch.cli:main"],
        "vllm.general_plugins": ["oproj_patch = oproj_patch:plugin"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
