//! Uploads of several parts into a directory, for `file://`: the parts lie in a directory beside the journals until they are joined.
//!
//! The crate `object_store` has such uploads for the services only.

use std::fs::{self, File};
use std::io;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use object_store::local::LocalFileSystem;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    Error, MultipartId, ObjectStoreExt as _, PutMultipartOptions, PutPayload, PutResult, Result,
};

use crate::journal::Key;

/// Parts in a directory of this machine.
#[derive(Debug)]
pub(crate) struct LocalParts {
    pub(crate) store: Arc<LocalFileSystem>,
    pub(crate) dir: PathBuf,
}

fn failed(path: &Path, cause: io::Error) -> Error {
    match cause.kind() {
        io::ErrorKind::NotFound => Error::NotFound {
            path: path.to_string(),
            source: cause.into(),
        },
        _ => Error::Generic {
            store: "parts",
            source: cause.into(),
        },
    }
}

impl LocalParts {
    fn upload(&self, id: &MultipartId) -> PathBuf {
        // An id is what `create_multipart` made; one of a garbled journal is made harmless.
        let safe: String = id.chars().filter(char::is_ascii_alphanumeric).collect();
        self.dir.join(safe)
    }

    async fn aside<T: Send + 'static>(
        &self,
        path: &Path,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let done = tokio::task::spawn_blocking(work).await?;
        done.map_err(|cause| failed(path, cause))
    }
}

#[async_trait]
impl MultipartStore for LocalParts {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        let id = Key::unique().map_err(|cause| failed(path, cause))?;
        let id = id.as_str().to_owned();
        let (all, upload) = (self.dir.clone(), self.upload(&id));
        self.aside(path, move || {
            fs::create_dir_all(&upload)?;
            File::open(all)?.sync_all()
        })
        .await?;
        Ok(id)
    }

    async fn create_multipart_opts(
        &self,
        path: &Path,
        _: PutMultipartOptions,
    ) -> Result<MultipartId> {
        self.create_multipart(path).await
    }

    async fn put_part(
        &self,
        path: &Path,
        id: &MultipartId,
        part: usize,
        data: PutPayload,
    ) -> Result<PartId> {
        let upload = self.upload(id);
        self.aside(path, move || {
            let mut file = File::create(upload.join(part.to_string()))?;
            for bytes in &data {
                io::Write::write_all(&mut file, bytes)?;
            }
            file.sync_all()?;
            File::open(&upload)?.sync_all()
        })
        .await?;
        Ok(PartId {
            content_id: part.to_string(),
        })
    }

    async fn complete_multipart(
        &self,
        path: &Path,
        id: &MultipartId,
        parts: Vec<PartId>,
    ) -> Result<PutResult> {
        let upload = self.upload(id);
        let mut whole = self.store.put_multipart(path).await?;
        for part in &parts {
            let file = upload.join(&part.content_id);
            let bytes = self.aside(path, move || fs::read(file)).await?;
            whole.put_part(Bytes::from(bytes).into()).await?;
        }
        let result = whole.complete().await?;
        self.abort_multipart(path, id).await?;
        Ok(result)
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        let upload = self.upload(id);
        self.aside(path, move || fs::remove_dir_all(upload)).await
    }
}

/// Ids of the uploads that have parts here.
pub(crate) fn uploads(dir: &FilePath) -> io::Result<Vec<String>> {
    let names =
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}
