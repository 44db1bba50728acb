"""A bank in a network that this library has never seen, by the names of the network's layers.

:func:`attach` reads features and CAM while the network runs, fills a bank with them and makes maps;
:func:`candidates` looks for the names; :func:`save_maps` writes maps as other code bases read them.
"""

from protoseg.tap.attached import LastStep, Maps, Tap, attach
from protoseg.tap.files import save_maps
from protoseg.tap.ranking import Candidate, candidates

__all__ = ["Candidate", "LastStep", "Maps", "Tap", "attach", "candidates", "save_maps"]
