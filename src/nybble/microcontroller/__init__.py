"""Training on microcontrollers: plain 16-bit floats, emulated here to the bit, and written as C.

Tensors, gradients, weights and accumulators are all fp16 (or bf16, or fp32 to compare with), one sample at a time; the
order in which a dot product is added up is part of its result.

=====================  ==============================================================================================
:mod:`.arithmetic`     one rounding after each operation, or after each multiply-add; products lane by lane
:mod:`.transforms`     im2row of inputs and of gradients, block transpose of weights, CHW and HWC
:mod:`.matrix_forms`   forward, weight gradient and input gradient of each layer as matrix products
:mod:`.layers`         what a network is made of: each computes itself, and says the C that does the same
:mod:`.stack`          layers in order; which gradients a sparse update needs
:mod:`.trace`          a torch network -> a stack, or the layer that has no such form
:mod:`.emulator`       one training step, every bit as the C has it
:mod:`.memory`         elements by layer and step, and the arrays that the C declares
:mod:`.project`        the C: a folder with a Makefile
:mod:`.compiler`       gcc: whether it is there, and what it makes of such a folder
:mod:`.networks`       ResNet8 and DS-CNN without BatchNorm
=====================  ==============================================================================================

Source: Nadalini, Rusci, Benini, Conti, "Reduced Precision Floating-Point Optimization for Deep Neural Network
On-Device Learning on MicroControllers", arXiv:2305.19167.
"""
