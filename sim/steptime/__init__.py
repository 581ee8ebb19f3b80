"""How long the work of a step takes.

`work` is what a step computes (`StepWork`); `basis` holds every term of a step time once, with its unit and meaning;
`linear` is a step time with coefficients for those terms; `segment` lays a run of equally shaped steps on the clock, in
closed form; `noise` is what a step time leaves over.
"""
