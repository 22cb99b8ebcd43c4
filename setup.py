"""Package definition. Only `mealfast` is a top-level name in the wheel: see `package_dir`."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# A room imports only itself and those before it (tests/test_rooms.py).
ROOMS = ["machine", "models", "method", "record", "labels", "training", "measure", "downstream", "figures", "cli"]

setup(
    name="mealfast",
    version="0.1.0",
    description="Distil ensembles of pretrained image classifiers into small ones (MEAL V2), fast",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The folders stand side by side in the checkout and nest in the package: a top-level `kernels`
    # in site-packages would shadow Hugging Face's package of that name.
    package_dir={
        "mealfast": "mealfast",
        "mealfast.loaders": "loaders",
        "mealfast.kernels": "kernels",
    },
    packages=["mealfast", "mealfast.loaders", "mealfast.kernels", *(f"mealfast.{room}" for room in ROOMS)],
    package_data={"mealfast": ["py.typed"]},
    entry_points={"console_scripts": ["mealfast = mealfast.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "timm>=1.0.15",  # architectures and their preprocessing; brings torchvision, safetensors and Pillow
        "nvidia-dali-cuda120>=2.4; platform_system == 'Linux'",  # JPEG decoding and cropping; runs without a GPU too
        "numpy>=1.26",
        "pillow>=10.0",  # the reference loader
        "safetensors>=0.4.3",  # the student that plain timm loads
        "tensorboard>=2.16",
        "tqdm>=4.66",  # progress bars
        "tomli>=2; python_version < '3.11'",  # files of options; from 3.11 on Python has it
    ],
    extras_require={
        "demo": ["scikit-learn>=1.4", "matplotlib>=3.8"],  # the digits, and the figure of the demo
        "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],  # mealfast export --to onnx
        # Triton comes with PyTorch's CUDA builds; its interpreter runs the kernels anywhere.
        "test": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.12", "mypy>=1.18", "triton; platform_system == 'Linux'"],
    },
)
