"""StyleGAN-Fusion's claims (arXiv 2212.04473), measured on the mini world: ``python run.py claims sgf [--quick]``.

`tasks` says what is asked and its exact answers, `recipes` how it is asked for, `measures` what is looked at, `runs`
adapts the shipped generator, `points` measures and keeps, `sweep` lists what to measure in which order, `verdicts`
decides, `report` shows. Statistics, the folder of kept rows, the plot and the command line are those of `claims`.
"""
