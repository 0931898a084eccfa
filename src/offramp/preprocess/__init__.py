"""From a raw row, as it stands in a file, to what a model is fed: texts, images, or columns of numbers."""

from offramp.preprocess.base import FILE, Preprocess, Row
from offramp.preprocess.image import ImagePreprocess
from offramp.preprocess.load import load_preprocess
from offramp.preprocess.numbers import NumberPreprocess
from offramp.preprocess.text import TextPreprocess

__all__ = ["FILE", "ImagePreprocess", "NumberPreprocess", "Preprocess", "Row", "TextPreprocess", "load_preprocess"]
