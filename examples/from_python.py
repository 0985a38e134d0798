"""Attack a photo, see what became of it, judge it by another detector: `python examples/from_python.py bus.jpg`."""

import sys
import tempfile
from pathlib import Path

from PIL import Image

import detguard


def main(photo: str, folder: str) -> dict[str, float]:
    """Attack a photo for detguard-n, save the result, and return what is left of the target, by member."""
    detector = detguard.load_detector("detguard-n")
    attacked = detguard.attack(
        detector,
        photo,
        objective=detguard.Vanish("person"),
        transforms="median:3,jpeg:75",
        budget=detguard.Linf(8),
        out=folder,
    )
    for result in attacked:
        print(f"{result.key}: {result.status} after {result.record.get('iterations')} iterations")
        if result.status in ("fooled", "failed"):
            Image.fromarray(result.photo).save(Path(folder) / "adversarial.png")
    left = {}
    for record in detguard.verify(folder, detguard.load_detector("detguard-n-hard"), transforms="jpeg:50"):
        left |= {name: member["confidence"] for name, member in record.get("members", {}).items()}
    print("confidence that the hardened detector has left:", left)
    return left


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1], temporary)
