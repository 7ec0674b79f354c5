"""Make the demo data: synthetic birds, recordists and soundscapes in the competition's layout.

Read `songs` (what each species sings), `synthesis` (how a song becomes sound), `ambience` (what
else is heard), `plan` with `recordings` and `soundscapes` (who sings when), `rendering`, `writer`.
"""

from birdcall.demo.plan import DemoConfig
from birdcall.demo.writer import make_demo, plan_demo

__all__ = ["DemoConfig", "make_demo", "plan_demo"]
