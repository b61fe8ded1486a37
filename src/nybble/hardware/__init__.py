"""Arithmetic units as hardware: what a multiply-accumulate unit computes, its Verilog, and tools that check and map it.

=================  ====================================================================================
:mod:`.operand`    a number format as a multiplier sees it: sign, significand, shift; or fixed point
:mod:`.mac`        ``MacUnit``: two formats and a length -> widths, and the exact sum that it computes
:mod:`.verilog`    the unit as text, and a bench that plays vectors
:mod:`.tools`      the bench run by Icarus Verilog, the unit mapped to LUTs by Yosys
=================  ====================================================================================

What a unit costs without running any tool is :mod:`nybble.costs.mac`.
"""
