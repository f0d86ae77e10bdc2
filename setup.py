"""Which folders are packages, and the kernel libraries that a wheel carries.

bigtrain/ is the library, launch/ is installed as bigtrain.launch, kernels/ as bigtrain.kernels:
its sources, and in a wheel what they were built to. Without a compiler a wheel has none and is for
any machine; there, kernels are built when first wanted, or torch does their work.

    BIGTRAIN_KERNELS=auto|off|require   the libraries of the CPU
    BIGTRAIN_CUDA=auto|off|require      that of CUDA, for which nvcc is needed
"""

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


def wanted():
    """Return the targets to build, those that there is a compiler for."""
    cpu, cuda = build.wish("BIGTRAIN_KERNELS"), build.wish("BIGTRAIN_CUDA")
    targets = []
    for wish, some in ((cpu, build.cpu_targets()), (cuda if cpu != "off" else "off", [build.CUDA])):
        if wish == "off":
            continue
        try:
            build.compiler_of(some[0])
            targets += some
        except build.NoCompiler as error:
            if wish == "require":
                raise SystemExit(f"error: {error}") from None
            log.warning("without %s: %s", ", ".join(t.file for t in some), error)
    return targets


class BuildPackages(build_py):
    """Copies the packages, and builds the libraries into the copy."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout builds what is wanted when it is wanted
        folder = Path(self.build_lib) / "bigtrain" / "kernels" / build.PREBUILT.name
        shutil.rmtree(folder, ignore_errors=True)  # of a build before this one
        try:
            build.build(wanted(), folder)
        except build.BuildError as error:
            raise SystemExit(f"error: a kernel library could not be built\n{error}") from None


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
