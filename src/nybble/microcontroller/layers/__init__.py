"""What a stack is made of."""

from nybble.microcontroller.layers.activation import ACTIVATIONS, Activation
from nybble.microcontroller.layers.conv import Conv, Pointwise
from nybble.microcontroller.layers.linear import Linear
from nybble.microcontroller.layers.norm import InstanceNorm
from nybble.microcontroller.layers.pooling import AveragePool, MaxPool
from nybble.microcontroller.layers.residual import Add

__all__ = ["ACTIVATIONS", "Activation", "Add", "AveragePool", "Conv", "InstanceNorm", "Linear", "MaxPool", "Pointwise"]
