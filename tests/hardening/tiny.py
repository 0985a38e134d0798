"""A network of a layer of each kind that YOLO11 has, where it does not matter how many there are."""

from ultralytics.nn.tasks import DetectionModel


def tiny(classes):
    backbone = [
        *([-1, 1, "Conv", [channels, 3, 2]] for channels in (8, 16, 32, 64, 128)),
        [-1, 1, "C3k2", [128, True]],
        [-1, 1, "SPPF", [128, 5]],
        [-1, 1, "C2PSA", [128]],
    ]
    head = [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 1, "C3k2", [64, False]],
        [[2, 10, 7], 1, "Detect", ["nc"]],
    ]
    return DetectionModel({"nc": classes, "backbone": backbone, "head": head}, verbose=False)
