# SPDX-License-Identifier: Apache-2.0
"""Builds the op's kernel where there is a compiler; elsewhere its PyTorch reference runs.

pip install --no-build-isolation .    # builds against the torch of this environment
"""

import shutil

from setuptools import setup

if shutil.which("c++"):
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # The stable ABI of PyTorch 2.11 and no Python header: one file for every later version of both.
    setup(
        ext_modules=[
            CppExtension(
                "kvcompress_outliers._C",
                ["csrc/outliers.cpp"],
                define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
                extra_compile_args=["-O3", "-std=c++17"],
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    setup()
