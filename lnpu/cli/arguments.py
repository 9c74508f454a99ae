"""Arguments that several commands have."""

import argparse

from lnpu.config import CONFIGS

__all__ = ["CONFIG_NAMES", "Subparsers", "config_argument", "data_argument", "network_arguments", "step_arguments"]

Subparsers = argparse._SubParsersAction  # the type of what `add_subparsers` returns; it has no public name

CONFIG_NAMES = ", ".join(CONFIGS)


def config_argument(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--config", default=default, help=f"configuration: {CONFIG_NAMES}")


def data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", help="CIFAR-10's own files (folder or archive) or an .npz; without: scikit-learn's digits"
    )


def network_arguments(parser: argparse.ArgumentParser, *, width: int, image: int, batch: int) -> None:
    """Images, and the ResNet-18 that is trained on them."""
    data_argument(parser)
    parser.add_argument("--width", type=int, default=width, help="channels of the first stage (64 in the paper)")
    parser.add_argument("--image", type=int, default=image, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=batch, help="images a step")


def step_arguments(parser: argparse.ArgumentParser, *, config: str, width: int, image: int, batch: int) -> None:
    """A training step on a simulated chip."""
    config_argument(parser, config)
    network_arguments(parser, width=width, image=image, batch=batch)
    parser.add_argument("--stem", default="cifar", choices=("cifar", "imagenet"), help="first layers")
    parser.add_argument("--formats", default="dynamic", help="dynamic, fgmp, fp16 or fp8")
    parser.add_argument("--dense", action="store_true", help="no zeros from ReLU: batch norms begin with beta = 8")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and the order of images")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate")
    parser.add_argument("--loss-scale", type=float, default=1024.0, help="factor on the loss gradient")
