"""Stage two of ``run.py``: starts a ComfyUI with this checkout in it and drives it over its API.

Runs in an environment that can run ComfyUI; the nodes never import it. ``server`` starts and ends the server process,
``client`` speaks its HTTP and websocket API, ``demo`` makes the pictures of ``run.py demo``. ``environment`` is the
exception: stage one loads it by its path, to find or build the environment.
"""
