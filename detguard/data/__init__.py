"""Labelled data in: COCO json and YOLO folders, corruptions."""
