"""Which folders are packages: bigtrain/ is the library, launch/ is installed as bigtrain.launch."""

from setuptools import find_packages, setup

setup(
    packages=[
        "bigtrain",
        *(f"bigtrain.{name}" for name in find_packages("bigtrain")),
        "bigtrain.launch",
    ],
    package_dir={"bigtrain": "bigtrain", "bigtrain.launch": "launch"},
)
