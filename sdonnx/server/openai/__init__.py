"""OpenAI's images API, ``/v1``, as its clients use it.

    routes      the URLs
    fields      parameters: read from JSON or a form, and turned into a `Request`
    uploads     forms with images and masks
    generate    generations, edits and variations
    replies     what clients get: images in base64 or as URLs
    streaming   the same as server-sent events, with partial images
    models      the models
    errors      OpenAI's error objects

Where a local model differs: ``n``, ``size``, ``output_format`` and ``output_compression`` mean the same; ``quality``
low is ``--fast``; an edit without a mask is image to image at strength 0.75. ``seed``, ``steps``, ``cfg_scale``,
``negative_prompt``, ``sampler`` and, for edits, ``strength`` are additions (``extra_body``). Every name of OpenAI's own
image models stands for the default package; with those of DALL-E the default ``response_format`` is url, as it was
there, else it is b64_json. What changes no image here, such as ``user``, ``style`` or
``moderation``, is ignored.
"""
