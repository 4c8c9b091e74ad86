"""The convolution family: lightweight, dynamic and depthwise convolution are one operator with different weights."""
