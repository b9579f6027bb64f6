"""`python -m sdlib`: the commands of the package, each with its own --help."""

import sdlib

COMMANDS = {
    "python -m sdlib.pipeline": "paint a picture from a prompt",
    "python -m sdlib.editing": "paint a picture, or a part of it, again",
    "python -m sdlib.training": "train a part of the model from a file in configs/",
}


def main() -> None:
    """Print the commands."""
    print(f"sdlib {sdlib.__version__}: Stable Diffusion from scratch\n")
    width = max(map(len, COMMANDS))
    for command, purpose in COMMANDS.items():
        print(f"  {command:{width}}   {purpose}")
    print("\nEach explains itself with --help. The course: chapters/00_welcome.ipynb")


if __name__ == "__main__":
    main()
