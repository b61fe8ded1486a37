"""Which format each layer gets for a budget, or which architecture a network.

Of formats, costs (:mod:`nybble.costs`), sensitivities and a loop give a Scheme.

* ``sensitivities/``: what each layer loses in each format of a menu, one way to measure it a file.
* ``loops/``: how formats are chosen for the smallest sum of losses within a budget, one a file.
* ``architectures/``: which architecture a network has for a budget, one method a file.
* :mod:`.study` is the model in memory that sensitivities measure, :mod:`.groups` which layers have to agree,
  :mod:`.problem` the numbers that a loop gets, :mod:`.yardsticks` what its answer is compared with.

A named search is a YAML file in ``nybble/recipes/search``: a sensitivity and a loop, or an architecture method, with
their options.
"""
