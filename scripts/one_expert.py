"""Write one expert of an ensemble as a network of its own, to be judged alone.

python scripts/one_expert.py runs/harden/001/weights/sparse.safetensors adversarial one.safetensors
"""

from pathlib import Path

import typer

from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import load_model, read_card, save_gated


def main(model: Path, expert: str, out: Path) -> None:
    network, _ = load_model(str(model))
    if not isinstance(network, GatedNetwork) or expert not in network.names:
        raise SystemExit(f"{model}: expected an ensemble with an expert '{expert}'")
    number = network.names.index(expert)
    alone = GatedNetwork(network.single(number), 0, (expert,), sparse=(0,) if number in network.sparse else ())
    alone.experts[0].load_state_dict(network.experts[number].state_dict())
    card = read_card(str(model))
    save_gated(alone, {name: card[name] for name in card if name not in ("gated", "measured")}, out)


if __name__ == "__main__":
    typer.run(main)
