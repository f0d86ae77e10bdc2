"""Which folders are packages, and the kernel libraries that a wheel carries.

bigtrain/ is the library, launch/ is installed as bigtrain.launch, kernels/ as bigtrain.kernels:
its sources, and in a wheel what they were built to. Without a compiler a wheel has none and is for
any machine; there, kernels are built when first wanted, or torch does their work.

    BIGTRAIN_KERNELS=auto|off|require   the libraries of the CPU
    BIGTRAIN_CUDA=auto|off|require      that of CUDA, for which nvcc is needed
"""

import functools
import logging
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from kernels import build

log = logging.getLogger("bigtrain")


@functools.cache
def wanted():
    """Return the groups of targets to build, those that there is a compiler for, and the wishes."""
    try:
        wishes = [build.wish(name) for name in ("BIGTRAIN_KERNELS", "BIGTRAIN_CUDA")]
    except build.BuildError as error:
        raise SystemExit(f"error: {error}") from None
    if wishes[0] == "off":
        wishes[1] = "off"
    groups = []
    for wish, targets in zip(wishes, (build.cpu_targets(), [build.CUDA]), strict=True):
        if wish == "off":
            continue
        try:
            build.compiler_of(targets[0])
            groups.append((wish, targets))
        except build.NoCompiler as error:
            go_without(wish, targets, error)
    return groups


def go_without(wish, targets, error):
    """End the build if these libraries are required, else say that they will be missing."""
    if wish == "require":
        raise SystemExit(f"error: {error}") from None
    log.warning("without %s: %s", ", ".join(target.file for target in targets), error)


class BuildPackages(build_py):
    """Copies the packages, and builds the libraries into the copy."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout builds what is wanted when it is wanted
        folder = Path(self.build_lib) / "bigtrain" / "kernels" / build.PREBUILT.name
        shutil.rmtree(folder, ignore_errors=True)  # of a build before this one
        for wish, targets in wanted():
            try:
                build.build(targets, folder)
            except build.BuildError as error:
                go_without(wish, targets, error)


class Package(Distribution):
    def has_ext_modules(self):
        return bool(wanted())


class Wheel(bdist_wheel):
    """A wheel with libraries is for one kind of machine, but for every Python and torch."""

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(
    packages=[
        "bigtrain",
        *(f"bigtrain.{name}" for name in find_packages("bigtrain")),
        "bigtrain.launch",
        "bigtrain.kernels",
    ],
    package_dir={
        "bigtrain": "bigtrain",
        "bigtrain.launch": "launch",
        "bigtrain.kernels": "kernels",
    },
    package_data={
        "bigtrain": ["py.typed"],
        "bigtrain.kernels": ["README.md", "include/*", "cpu/*", "cpu/*/*", "cuda/*", "cuda/*/*"],
    },
    distclass=Package,
    cmdclass={"build_py": BuildPackages, "bdist_wheel": Wheel},
)
