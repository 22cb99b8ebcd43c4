"""`mealfast export`: a trained model for timm, ONNX, torchvision or TorchScript."""

from __future__ import annotations

from mealfast.cli.options import Parser
from mealfast.cli.view_options import check_positive

FORMATS = ("timm", "onnx", "torchvision", "torchscript")


def make_parser() -> Parser:
    """The options of `mealfast export`."""
    parser = Parser(
        prog="mealfast export",
        usage="mealfast export RUN|SPEC --to timm|onnx|torchvision|torchscript DIR [OPTIONS]",
        description="Writes a model into a new folder DIR, with a README.md that says what it is and how it is loaded, "
        "and compares its logits with PyTorch's before it is called done. timm: config.json and model.safetensors, as "
        "`timm.create_model('local-dir:DIR', pretrained=True)` and the Hugging Face hub take them. onnx: model.onnx "
        "for any batch size (pip install 'mealfast[export]'). torchvision: a state dict for its model of that name.",
    )
    add = parser.add_argument
    add("source", metavar="RUN|SPEC", help="run directory, or model spec")
    add("out", metavar="DIR", help="folder to write; new or empty")
    add("--to", required=True, choices=FORMATS, metavar="|".join(FORMATS), help="what it is for")
    add("--size", type=int, metavar="N", help="side of the input, in pixels (default: the run's, or the model's own)")
    add(
        "--with-preprocessing", action="store_true",
        help="normalise inside the model: its input is uint8 [N, S, S, 3] (onnx and torchscript; default: normalised "
        "float32 [N, 3, S, S])",
    )  # fmt: skip
    return parser


def export_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError."""
    options = make_parser().parse_args(argv)
    check_positive(options, "size")

    from mealfast.downstream.exports import export  # takes torch: not for --help
    from mealfast.record.console import size_text

    made = export(
        options.source, options.to, options.out, size=options.size, with_preprocessing=options.with_preprocessing
    )
    print("\n".join(made["found"]))
    print(f"{made['folder']}: " + ", ".join(f"{name} ({size_text(size)})" for name, size in made["files"].items()))
    return 0
