//! [`Backend`]: one object store, and what of it an upload needs beyond the crate `object_store`.
//!
//! That crate completes an upload of several parts whatever has the key. S3 itself can refuse that, by a condition on the request;
//! [`OnlyIfFree`] adds it. A store without that gets the object under a key of our own first, and then its name by a copy that
//! refuses.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path as FilePath;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpRequestBody, HttpResponse, HttpService,
    ReqwestConnector,
};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::signer::{Method, SignedUrlOptions, Signer as _};
use object_store::{
    BackoffConfig, ClientConfigKey, ClientOptions, Error as Cause, HeaderValue, ObjectStore,
    RetryConfig,
};
use url::Url;

use crate::error::{OpenError, Trouble, trouble};
use crate::local::LocalParts;
use crate::sink::Settings;

/// One object store.
#[derive(Clone)]
pub(crate) struct Backend {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) parts: Arc<dyn MultipartStore>,
    /// Of S3.
    pub(crate) s3: Option<S3>,
    /// Listings come in the order of their keys.
    pub(crate) sorted: bool,
    /// Objects carry metadata of ours.
    pub(crate) attributes: bool,
    /// All keys are below it; empty for the whole bucket.
    pub(crate) prefix: String,
    /// The address, without anything secret.
    pub(crate) url: String,
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl Backend {
    /// The store at this address, with the settings that the environment has.
    pub(crate) fn open(
        address: &str,
        extra: &Settings,
        journals: &FilePath,
    ) -> Result<Self, OpenError> {
        let unknown = || OpenError::Address {
            url: address.to_owned(),
        };
        let url = Url::parse(address).map_err(|_| unknown())?;
        let bucket = url.host_str().unwrap_or_default();
        if !url.username().is_empty() || url.query().is_some() || url.fragment().is_some() {
            return Err(unknown());
        }
        let settings = |cause| OpenError::Settings {
            url: address.to_owned(),
            cause: Box::new(cause),
        };
        let prefix = Path::from_url_path(url.path()).map_err(|cause| settings(cause.into()))?;
        let prefix = String::from(prefix);
        match url.scheme() {
            "s3" if !bucket.is_empty() => s3(address, bucket, prefix, extra).map_err(settings),
            "gs" if !bucket.is_empty() => {
                let mut set = google_timeout(GoogleCloudStorageBuilder::from_env());
                for (name, value) in extra.pairs() {
                    set = set.with_config(name.parse().map_err(settings)?, value);
                }
                let built = set.with_bucket_name(bucket).with_retry(retries()).build();
                let store = Arc::new(built.map_err(settings)?);
                Ok(Self::of(store.clone(), store, address, prefix))
            }
            "az" if !bucket.is_empty() => {
                let mut set = azure_timeout(MicrosoftAzureBuilder::from_env());
                for (name, value) in extra.pairs() {
                    set = set.with_config(name.parse().map_err(settings)?, value);
                }
                let built = set
                    .with_container_name(bucket)
                    .with_retry(retries())
                    .build();
                let store = Arc::new(built.map_err(settings)?);
                Ok(Self::of(store.clone(), store, address, prefix))
            }
            "file" if bucket.is_empty() => {
                let root = url.to_file_path().map_err(|()| unknown())?;
                local(&root, journals, address).map_err(settings)
            }
            _ => Err(unknown()),
        }
    }

    /// A store in memory, for tests.
    pub(crate) fn memory() -> Self {
        let store = Arc::new(InMemory::new());
        Self::of(store.clone(), store, "memory:", "files".to_owned())
    }

    fn of(
        store: Arc<dyn ObjectStore>,
        parts: Arc<dyn MultipartStore>,
        url: &str,
        prefix: String,
    ) -> Self {
        Self {
            store,
            parts,
            s3: None,
            sorted: true,
            attributes: true,
            prefix,
            url: url.to_owned(),
        }
    }

    /// The key of a name; `None` where it has none.
    pub(crate) fn key(&self, name: &str) -> Option<Path> {
        let key = match self.prefix.as_str() {
            "" => name.to_owned(),
            prefix => format!("{prefix}/{name}"),
        };
        let fits = key.len() <= LONGEST_KEY && !key.chars().any(char::is_control);
        fits.then(|| Path::parse(&key).ok())?
            .filter(|path| path.as_ref() == key)
    }

    /// The name that a key has below the prefix.
    pub(crate) fn name<'a>(&self, key: &'a Path) -> Option<&'a str> {
        let key = key.as_ref();
        match self.prefix.as_str() {
            "" => Some(key),
            prefix => key.strip_prefix(prefix)?.strip_prefix('/'),
        }
    }
}

fn s3(address: &str, bucket: &str, prefix: String, extra: &Settings) -> Result<Backend, Cause> {
    let free = OnlyIfFree::default();
    let mut set = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_retry(retries())
        .with_http_connector(free.clone());
    for (name, value) in extra.pairs() {
        set = set.with_config(name.parse()?, value);
    }
    let timeout = AmazonS3ConfigKey::Client(ClientConfigKey::Timeout);
    let set = match set.get_config_value(&timeout) {
        Some(_) => set,
        None => set.with_config(timeout, TIMEOUT),
    };
    let plain = AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp);
    let plain = set
        .get_config_value(&plain)
        .is_some_and(|word| word == "true");
    let store = Arc::new(set.build()?);
    let options = ClientOptions::new()
        .with_allow_http(plain)
        .with_timeout(Duration::from_secs(30));
    let client = ReqwestConnector::default().connect(&options)?;
    Ok(Backend {
        s3: Some(S3 {
            store: store.clone(),
            client,
            free,
        }),
        ..Backend::of(store.clone(), store, address, prefix)
    })
}

fn google_timeout(set: GoogleCloudStorageBuilder) -> GoogleCloudStorageBuilder {
    let timeout = GoogleConfigKey::Client(ClientConfigKey::Timeout);
    match set.get_config_value(&timeout) {
        Some(_) => set,
        None => set.with_config(timeout, TIMEOUT),
    }
}

fn azure_timeout(set: MicrosoftAzureBuilder) -> MicrosoftAzureBuilder {
    let timeout = AzureConfigKey::Client(ClientConfigKey::Timeout);
    match set.get_config_value(&timeout) {
        Some(_) => set,
        None => set.with_config(timeout, TIMEOUT),
    }
}

fn local(root: &FilePath, journals: &FilePath, address: &str) -> Result<Backend, Cause> {
    let generic = |cause: std::io::Error| Cause::Generic {
        store: "file",
        source: cause.into(),
    };
    std::fs::create_dir_all(root).map_err(generic)?;
    let parts = journals.join("parts");
    std::fs::create_dir_all(&parts).map_err(generic)?;
    File::open(journals)
        .and_then(|dir| dir.sync_all())
        .map_err(generic)?;
    let store = LocalFileSystem::new_with_prefix(root)?.with_fsync(true);
    let store = Arc::new(store);
    let parts = Arc::new(LocalParts {
        store: store.clone(),
        dir: parts,
    });
    Ok(Backend {
        sorted: false,
        attributes: false,
        ..Backend::of(store, parts, address, String::new())
    })
}

fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(10),
            base: 2.0,
        },
        max_retries: 8,
        retry_timeout: Duration::from_secs(60),
    }
}

/// What S3 can beyond the crate `object_store`.
#[derive(Clone, Debug)]
pub(crate) struct S3 {
    store: Arc<AmazonS3>,
    client: HttpClient,
    pub(crate) free: OnlyIfFree,
}

impl S3 {
    /// Notes the hash of an object beside it, as a tag: of an upload of several parts, metadata is told before the bytes.
    pub(crate) async fn tag(&self, key: &Path, hash: blake3::Hash) -> Result<(), Cause> {
        let body = format!(
            "<Tagging xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><TagSet><Tag><Key>{TAG}</Key><Value>{hash}</Value></Tag></TagSet></Tagging>"
        );
        self.ask(Method::PUT, key, &[("tagging", "")], body).await?;
        Ok(())
    }

    /// The hash that was noted.
    pub(crate) async fn tagged(&self, key: &Path) -> Result<Option<blake3::Hash>, Cause> {
        let answer = self
            .ask(Method::GET, key, &[("tagging", "")], String::new())
            .await?;
        let tag = elements(&answer, "Tag").find(|tag| element(tag, "Key") == Some(TAG));
        let value = tag.and_then(|tag| element(tag, "Value"));
        Ok(value.and_then(|value| blake3::Hash::from_hex(value).ok()))
    }

    /// Ids of the uploads of this key that are under way.
    pub(crate) async fn uploads(&self, key: &Path) -> Result<Vec<String>, Cause> {
        let query = [("uploads", ""), ("prefix", key.as_ref())];
        let answer = self
            .ask(Method::GET, &Path::default(), &query, String::new())
            .await?;
        let ours = elements(&answer, "Upload")
            .filter(|upload| element(upload, "Key").is_some_and(|it| unescape(it) == key.as_ref()));
        let ids = ours.filter_map(|upload| element(upload, "UploadId").map(unescape));
        Ok(ids.collect())
    }

    /// One request, by a signed address, and again where it fails for a while.
    async fn ask(
        &self,
        method: Method,
        key: &Path,
        query: &[(&str, &str)],
        body: String,
    ) -> Result<String, Cause> {
        for pause in PAUSES {
            match self.try_ask(&method, key, query, &body).await {
                Err(cause) if trouble(&cause) == Trouble::Passing => {
                    tokio::time::sleep(pause).await
                }
                asked => return asked,
            }
        }
        self.try_ask(&method, key, query, &body).await
    }

    async fn try_ask(
        &self,
        method: &Method,
        key: &Path,
        query: &[(&str, &str)],
        body: &str,
    ) -> Result<String, Cause> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| Cause::Generic {
            store: "S3",
            source,
        };
        let options = SignedUrlOptions::new().with_query(query.iter().copied());
        let within = Duration::from_secs(60);
        let url = self
            .store
            .signed_url_opts(method.clone(), key, within, &options)
            .await?;
        let mut request = HttpRequest::new(HttpRequestBody::from(body.to_owned()));
        *request.method_mut() = method.clone();
        *request.uri_mut() = url.as_str().parse().map_err(|e| failed(Box::new(e)))?;
        let answer = self.client.execute(request).await;
        let answer = answer.map_err(|e| failed(Box::new(e)))?;
        let status = answer.status();
        let body = answer.into_body().bytes().await;
        let body = body.map_err(|e| failed(Box::new(e)))?;
        let body = String::from_utf8_lossy(&body).into_owned();
        match status.is_success() {
            true => Ok(body),
            false => Err(failed(format!("{status}: {body}").into())),
        }
    }
}

/// What stands in the elements of this name.
fn elements<'a>(xml: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let mut rest = xml;
    std::iter::from_fn(move || {
        let (_, behind) = rest.split_once(&open)?;
        let (inside, behind) = behind.split_once(&close)?;
        rest = behind;
        Some(inside)
    })
}

fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    elements(xml, name).next()
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&#34;", "\"")
        .replace("&apos;", "'")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

/// Uploads that are completed only if nothing has their key. A handle.
#[derive(Clone, Debug, Default)]
pub(crate) struct OnlyIfFree(Arc<Mutex<HashSet<String>>>);

impl OnlyIfFree {
    fn ids(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The completion of this upload is refused where its key is taken, for as long as the guard lives.
    pub(crate) fn guard(&self, id: &str) -> Guard {
        self.ids().insert(id.to_owned());
        Guard(self.clone(), id.to_owned())
    }
}

/// See [`OnlyIfFree::guard`].
#[derive(Debug)]
pub(crate) struct Guard(OnlyIfFree, String);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.ids().remove(&self.1);
    }
}

impl HttpConnector for OnlyIfFree {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Conditional {
            inner,
            free: self.clone(),
        }))
    }
}

/// Sends requests, with the condition where it belongs.
#[derive(Debug)]
struct Conditional {
    inner: HttpClient,
    free: OnlyIfFree,
}

#[async_trait]
impl HttpService for Conditional {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let query = request.uri().query().unwrap_or_default();
        let completes = request.method() == Method::POST
            && url::form_urlencoded::parse(query.as_bytes())
                .any(|(name, id)| name == "uploadId" && self.free.ids().contains(&*id));
        if completes {
            // The signature covers only the headers that it names.
            let any = HeaderValue::from_static("*");
            request.headers_mut().insert("if-none-match", any);
        }
        self.inner.execute(request).await
    }
}

/// Before a request of our own is made again.
const PAUSES: [Duration; 3] = [
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
];
/// The tag that holds the hash of an object.
const TAG: &str = "udpack-blake3";
/// Most bytes of a key, in every store.
const LONGEST_KEY: usize = 1024;
/// For one request, the bytes of a part included.
const TIMEOUT: &str = "120s";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_store_holds_have_no_key() {
        let backend = Backend::memory();
        assert_eq!(backend.key("a b/ü#?%").unwrap().as_ref(), "files/a b/ü#?%");
        assert_eq!(backend.key("a\u{7}"), None);
        assert_eq!(backend.key("a\u{85}"), None);
        assert_eq!(backend.key(&"x/".repeat(600)), None);
        let key = backend.key("x/y").unwrap();
        assert_eq!(backend.name(&key), Some("x/y"));
    }

    #[test]
    fn addresses_that_are_none_are_refused_with_what_is_one() {
        let dir = tempfile::tempdir().unwrap();
        for url in [
            "",
            "s3:",
            "s3:///x",
            "ftp://a/b",
            "s3://user@b/",
            "file://host/x",
            "s3://b/x?y=z",
        ] {
            let refused = Backend::open(url, &Settings::default(), dir.path());
            assert!(
                matches!(refused, Err(OpenError::Address { .. })),
                "{url}: {refused:?}"
            );
        }
    }

    #[test]
    fn uploads_are_found_in_an_answer() {
        let answer = "<R><Upload><Key>a&amp;b</Key><UploadId>1</UploadId></Upload><Upload><Key>c</Key><UploadId>2</UploadId></Upload></R>";
        let keys: Vec<_> = elements(answer, "Upload")
            .filter_map(|upload| element(upload, "Key").map(unescape))
            .collect();
        assert_eq!(keys, ["a&b", "c"]);
    }
}
