import logging

# At its import it would warn that the image processors of CLIP and SigLIP do without torchvision.
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
