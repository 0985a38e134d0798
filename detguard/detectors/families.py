"""The families of detectors. A new one is its file, which says what `base.Family` asks, and its line here."""

from detguard.detectors.base import Family
from detguard.detectors.gated import Gated
from detguard.detectors.huggingface import HuggingFace
from detguard.detectors.onnx import Onnx
from detguard.detectors.rcnn import TWO_STAGE
from detguard.detectors.torchvision import ONE_STAGE
from detguard.detectors.ultralytics import Ultralytics

# A network is of the first that owns it.
FAMILIES: tuple[Family, ...] = (Gated(), ONE_STAGE, TWO_STAGE, Onnx(), HuggingFace(), Ultralytics())
