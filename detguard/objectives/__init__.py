"""What an attacker wants, one small file per objective: a loss on candidates and a success test on detections."""

from detguard.objectives.degrade import Degrade
from detguard.objectives.fabricate import Fabricate
from detguard.objectives.flood import Flood
from detguard.objectives.mislabel import Mislabel
from detguard.objectives.outrank import Outrank
from detguard.objectives.untargeted import Untargeted
from detguard.objectives.vanish import Vanish

__all__ = ["Degrade", "Fabricate", "Flood", "Mislabel", "Outrank", "Untargeted", "Vanish"]
