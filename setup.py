from setuptools import find_packages, setup

# These folders are top-level in the repository but installed inside kdfast: as a top-level package,
# `kernels` would be taken by transformers for the library of that name.
MAPPED = {"kdfast.kernels": "kernels", "kdfast.benchmarks": "benchmarks"}

packages = find_packages(include=["kdfast", "kdfast.*"])
for package, folder in MAPPED.items():
    packages += [package, *(f"{package}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=MAPPED)
