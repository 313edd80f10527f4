//! TLS of a server's connections: rustls shakes hands, and goes when it has nothing left to say.
//!
//! What it keeps beyond that, some 2.5 kB of every connection, is of no use to QUIC: records there are none, a
//! server takes no further handshake message (RFC 9001, sections 4.4 and 6), and the keys of an update need only
//! the secrets of this one. Of quinn's own `TlsSession` this is the server's half, without what is off here: early
//! data, certificates of clients, exported secrets. Other versions than QUIC 1 are left to quinn's.

use std::any::Any;
use std::sync::Arc;

use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use quinn::crypto::{
    self, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, ServerConfig,
    UnsupportedVersion,
};
use quinn::{ConnectionId, Side, TransportErrorCode};
use quinn_proto::TransportError;
use quinn_proto::transport_parameters::TransportParameters;
use rustls::quic::{KeyChange, Secrets, ServerConnection, Suite, Version};
use rustls::{AlertDescription, CipherSuite, SupportedCipherSuite, Tls13CipherSuite};

/// The TLS configuration of a server for quinn.
pub(crate) struct ServerTls {
    quinn: Arc<QuicServerConfig>,
    tls: Arc<rustls::ServerConfig>,
    /// Protects the first packets.
    initial: Suite,
}

impl ServerTls {
    /// # Errors
    /// When the provider lacks the cipher that QUIC begins with.
    pub(crate) fn new(tls: rustls::ServerConfig) -> Result<Self, rustls::Error> {
        let tls = Arc::new(tls);
        let suites = tls.crypto_provider().cipher_suites.iter();
        let initial = suites
            .filter_map(SupportedCipherSuite::tls13)
            .find(|suite| suite.common.suite == CipherSuite::TLS13_AES_128_GCM_SHA256)
            .and_then(Tls13CipherSuite::quic_suite)
            .ok_or_else(|| rustls::Error::General("no cipher for the first packets".to_owned()))?;
        let quinn = QuicServerConfig::with_initial(tls.clone(), initial)
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(Self {
            quinn: Arc::new(quinn),
            tls,
            initial,
        })
    }
}

impl ServerConfig for ServerTls {
    fn initial_keys(&self, version: u32, id: &ConnectionId) -> Result<Keys, UnsupportedVersion> {
        self.quinn.initial_keys(version, id)
    }

    fn retry_tag(&self, version: u32, id: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.quinn.retry_tag(version, id, packet)
    }

    fn start_session(
        self: Arc<Self>,
        version: u32,
        parameters: &TransportParameters,
    ) -> Box<dyn crypto::Session> {
        let mut said = Vec::new();
        parameters.write(&mut said);
        match ServerConnection::new(self.tls.clone(), Version::V1, said) {
            Ok(tls) if version == 1 => Box::new(Session {
                config: self,
                tls: Some(Box::new(tls)),
                next: None,
                told: false,
                protocol: None,
            }),
            _ => self.quinn.clone().start_session(version, parameters),
        }
    }
}

struct Session {
    config: Arc<ServerTls>,
    /// Until it has said all.
    tls: Option<Box<ServerConnection>>,
    /// Of the next update of the keys.
    next: Option<Secrets>,
    /// quinn knows that there is handshake data.
    told: bool,
    /// Of the configuration's protocols, the agreed one; known when `tls` is gone.
    protocol: Option<usize>,
}

impl Session {
    /// Lets go of rustls.
    fn settle(&mut self) {
        let tls = self.tls.take();
        let agreed = tls.as_ref().and_then(|tls| tls.alpn_protocol());
        let mut offered = self.config.tls.alpn_protocols.iter();
        self.protocol =
            agreed.and_then(|agreed| offered.position(|protocol| protocol.as_slice() == agreed));
    }
}

/// rustls' keys in quinn's boxes.
fn boxed(keys: rustls::quic::Keys) -> Keys {
    Keys {
        header: KeyPair {
            local: Box::new(keys.local.header),
            remote: Box::new(keys.remote.header),
        },
        packet: KeyPair {
            local: Box::new(keys.local.packet),
            remote: Box::new(keys.remote.packet),
        },
    }
}

fn failed(code: TransportErrorCode, reason: String) -> TransportError {
    TransportError {
        code,
        frame: None,
        reason,
    }
}

impl crypto::Session for Session {
    fn initial_keys(&self, id: &ConnectionId, _: Side) -> Keys {
        let suite = &self.config.initial;
        boxed(suite.keys(id, rustls::Side::Server, Version::V1))
    }

    /// The name of the server that the client asked for is forgotten with the handshake.
    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        if !self.told {
            return None;
        }
        let (protocol, server_name) = match &self.tls {
            Some(tls) => (tls.alpn_protocol(), tls.server_name()),
            None => {
                let protocols = &self.config.tls.alpn_protocols;
                let agreed = self.protocol.and_then(|place| protocols.get(place));
                (agreed.map(Vec::as_slice), None)
            }
        };
        Some(Box::new(HandshakeData {
            protocol: protocol.map(<[u8]>::to_vec),
            server_name: server_name.map(str::to_owned),
        }))
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        None
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        None
    }

    fn early_data_accepted(&self) -> Option<bool> {
        None
    }

    fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    fn read_handshake(&mut self, bytes: &[u8]) -> Result<bool, TransportError> {
        let Some(tls) = &mut self.tls else {
            let code = TransportErrorCode::crypto(AlertDescription::UnexpectedMessage.into());
            return Err(failed(
                code,
                "a handshake message after the handshake".to_owned(),
            ));
        };
        if let Err(error) = tls.read_hs(bytes) {
            let code = match tls.alert() {
                Some(alert) => TransportErrorCode::crypto(alert.into()),
                None => TransportErrorCode::PROTOCOL_VIOLATION,
            };
            return Err(failed(code, error.to_string()));
        }
        let known =
            tls.alpn_protocol().is_some() || tls.server_name().is_some() || !tls.is_handshaking();
        let first = known && !self.told;
        self.told |= known;
        Ok(first)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let tls = self.tls.as_ref();
        let Some(mut said) = tls.and_then(|tls| tls.quic_transport_parameters()) else {
            return Ok(None);
        };
        Ok(Some(TransportParameters::read(Side::Server, &mut said)?))
    }

    fn write_handshake(&mut self, bytes: &mut Vec<u8>) -> Option<Keys> {
        let tls = self.tls.as_mut()?;
        let before = bytes.len();
        match tls.write_hs(bytes) {
            Some(KeyChange::Handshake { keys }) => Some(boxed(keys)),
            Some(KeyChange::OneRtt { keys, next }) => {
                self.next = Some(next);
                Some(boxed(keys))
            }
            None => {
                // quinn asks until there is nothing more: then the ticket, too, is in its hands.
                if bytes.len() == before && !tls.is_handshaking() {
                    self.settle();
                }
                None
            }
        }
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.next.as_mut()?.next_packet_keys();
        Some(KeyPair {
            local: Box::new(keys.local),
            remote: Box::new(keys.remote),
        })
    }

    /// Only clients are asked to try again.
    fn is_valid_retry(&self, _: &ConnectionId, _: &[u8], _: &[u8]) -> bool {
        false
    }

    fn export_keying_material(
        &self,
        _: &mut [u8],
        _: &[u8],
        _: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        Err(ExportKeyingMaterialError)
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::ServerName;
    use rustls::quic::ClientConnection;

    use super::*;
    use crate::trust::identity::Identity;
    use crate::trust::tls::{ALPN, Trust, client_config, server_config};

    /// A client and a server's session, until neither has anything left to say.
    fn shaken(
        client: &Arc<rustls::ClientConfig>,
        server: &Arc<ServerTls>,
    ) -> (ClientConnection, Box<dyn crypto::Session>, usize) {
        let parameters = TransportParameters::read(Side::Server, &mut &[][..]).unwrap();
        let mut said = Vec::new();
        parameters.write(&mut said);
        let name = ServerName::try_from("any.name").unwrap();
        let mut client = ClientConnection::new(client.clone(), Version::V1, name, said).unwrap();
        let mut server = server.clone().start_session(1, &parameters);
        let mut ready = 0;
        for _ in 0..4 {
            let mut bytes = Vec::new();
            while client.write_hs(&mut bytes).is_some() {}
            if !bytes.is_empty() && server.read_handshake(&bytes).unwrap() {
                ready += 1;
            }
            loop {
                let mut bytes = Vec::new();
                let keys = server.write_handshake(&mut bytes);
                if !bytes.is_empty() {
                    client.read_hs(&bytes).unwrap();
                }
                if keys.is_none() && bytes.is_empty() {
                    break;
                }
            }
        }
        assert!(!client.is_handshaking());
        (client, server, ready)
    }

    #[test]
    fn a_settled_session_has_its_keys_and_its_protocol_and_refuses_more() {
        let identity = Identity::generate().unwrap();
        let server = server_config(identity.certificates()).unwrap();
        let server = Arc::new(ServerTls::new(server).unwrap());
        let (client, _) = client_config(Trust::Pin(identity.fingerprint())).unwrap();
        let client = Arc::new(client);
        for kind in [rustls::HandshakeKind::Full, rustls::HandshakeKind::Resumed] {
            // The last word of the first is the ticket for the second.
            let (client, mut server, ready) = shaken(&client, &server);
            assert_eq!(client.handshake_kind(), Some(kind));
            assert_eq!(ready, 1);
            assert!(!server.is_handshaking());
            // Known only while rustls is there.
            assert!(server.transport_parameters().unwrap().is_none());
            let data = server.handshake_data().unwrap();
            let data = data.downcast::<HandshakeData>().unwrap();
            assert_eq!(data.protocol.as_deref(), Some(ALPN));
            assert!(server.next_1rtt_keys().is_some());
            assert!(server.next_1rtt_keys().is_some());
            // A key update of TLS.
            let refused = server.read_handshake(&[24, 0, 0, 1, 0]).unwrap_err();
            assert_eq!(refused.code, TransportErrorCode::crypto(10));
        }
    }
}
