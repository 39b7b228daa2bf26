"""AUTOMATIC1111's API, ``/sdapi/v1``, and that of its ControlNet extension.

routes       the routes
fields       the fields of its requests, with their types and defaults
prepare      a request becomes a generation
samplers     its names of samplers and schedules
distilled    the limits of distilled models
controlnet   ControlNet's units, and its routes
generate     ``txt2img`` and ``img2img``: the job and its reply
options      the settings that clients read and change
progress     progress, interrupting
listings     models, LoRAs, samplers and what else can be chosen
extras       images that are resized, and the text that they carry
errors       its error objects
"""
